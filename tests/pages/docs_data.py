from pathlib import Path

from PIL import Image

from tests.pacs.pacs_for_tests import write_tree

write_tree(Path("path/to/PACS"))
for kind in ("crow", "finch", "owl", "wren"):
    Path("path/to/birds", kind).mkdir(parents=True)
    for number in range(2):
        Image.new("RGB", (8, 8)).save(Path("path/to/birds", kind, f"{number}.png"))
