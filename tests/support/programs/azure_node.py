"""Microsoft's clients for Node, and a linter that runs in it, where `tools/test` could fetch them."""

import shutil

import pytest

from fresh_machine import azure_node_folder

FOLDER = azure_node_folder()
NODE_IS_THERE = shutil.which("node") is not None and (FOLDER / "made-from").is_file()
WHERE_NODE_IS = pytest.mark.skipif(not NODE_IS_THERE, reason="there is no node, or npm could not fetch the clients")
