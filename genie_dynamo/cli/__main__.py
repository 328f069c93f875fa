"""`python -m genie_dynamo.cli`: the genie command where its script is not on the PATH."""
import sys

from genie_dynamo.cli.main import main

sys.exit(main())
