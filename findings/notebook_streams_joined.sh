#!/usr/bin/env bash
# nbclient 0.11.0: coalesce_streams moves what is printed after a picture before it, and processes no backspace.
#
# The option is documented with "Merge all stream outputs with shared names into single streams", and not with what becomes
# of the order. All pieces of a stream are joined in the first one, also those with another output between them: a cell
# that prints, shows something and prints again is saved as if it had printed all of it first. Jupyter's own interfaces
# join neighbours alone. "process \r and \b characters" says the comment in the source: a carriage return takes the text
# before it away for good, but the loop for backspaces compares the text with itself before anything was changed, and is
# never entered, so that they stay.
#
# Seen with nbclient 0.11.0, ipykernel 7.4.0, Python 3.11:
#     as the cell did it:    before, shown, after       coalesced: before after, shown
#     printed '12\b3':       coalesced '12\x083' (a terminal shows 13)
# Source: async_execute_cell in nbclient/client.py.
#
# Fails where that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'nbclient==0.11.0' 'nbformat==5.11.1' 'ipykernel==7.4.0' 'ipython==9.18.1'
cat > "$folder/streams.py" <<'PYTHON'
from importlib.metadata import version

import nbformat
from nbclient import NotebookClient

CELLS = [
    "print('before')\ndisplay({'text/plain': 'shown'}, raw=True)\nprint('after')",
    "print('12\\b3')",
]


def outputs(coalesce_streams):
    """Return the texts that each cell is saved with."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in CELLS])
    NotebookClient(notebook, coalesce_streams=coalesce_streams).execute()
    return [[output.get("text") or output["data"]["text/plain"] for output in c.outputs] for c in notebook.cells]


print(f"nbclient {version('nbclient')}")
plain, joined = outputs(False), outputs(True)
print(f"as the cell did it: {plain[0]}, coalesced: {joined[0]}")
print(f"printed '12\\b3': coalesced {joined[1]}")
assert plain[0] == ["before\n", "shown", "after\n"], "the cell itself shows something else"
assert joined[0] == ["before\nafter\n", "shown"], "the order is kept now"
assert joined[1] == ["12\b3\n"], "backspaces are processed now"
PYTHON
"$folder/venv/bin/python" "$folder/streams.py"
