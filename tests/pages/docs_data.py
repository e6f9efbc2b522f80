from pathlib import Path

from tests.pacs.pacs_for_tests import write_tree

write_tree(Path("path/to/PACS"))
