#!/usr/bin/env bash
# mypy --strict over the package as it installs. `passes` and `runtime` stand at the root and install inside
# genie_dynamo, which mypy cannot know: it gets a tree of links in build/ that looks like the installed package.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD tree=build/typecheck
rm -rf $tree/genie_dynamo
mkdir -p $tree/genie_dynamo
for entry in genie_dynamo/*; do
    [ "$(basename "$entry")" = __pycache__ ] || ln -s "$root/$entry" "$tree/$entry"
done
ln -s "$root/passes" "$root/runtime" $tree/genie_dynamo/
cp genie.py $tree/
cd $tree
MYPYPATH=. exec "$root/.venv/bin/python" -m mypy --config-file "$root/pyproject.toml" \
    --cache-dir "$root/.mypy_cache" -p genie_dynamo "$@"
