"""`import genie` is `import genie_dynamo`: the short name for scripts. `genie_dynamo` is the canonical name."""
import sys

import genie_dynamo

sys.modules[__name__] = genie_dynamo
