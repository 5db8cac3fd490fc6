"""The table in ports/README.md is that of the lists which the tests run."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import families


def test_the_table_is_up_to_date():
    text = (Path(__file__).parent / "README.md").read_text()
    _, rest = text.split("<!-- python ports/families.py -->\n")
    shown, _ = rest.split("\n<!-- end -->")
    assert shown == families.table()


def test_lists_are_read_without_imports(tmp_path):
    code = 'import nothing_of_this_name\nFAMILIES = {"a": (x, 1), "b": {}}\nREFUSED = {"c": "no " "cache"}\n'
    (tmp_path / "test_x.py").write_text(code)
    assert families.cells(tmp_path / "test_x.py") == {"a": "tested", "b": "tested", "c": "refused: no cache"}
    assert families.cells(tmp_path / "missing.py") == {}
