"""What README says in tables is what the package says of itself."""

from pathlib import Path

from unlabeled.ssl.data.registry import SOURCES, source_class

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")


def test_the_table_of_sources_is_current() -> None:
    for name in SOURCES:
        source = source_class(name)
        path = " data.path=…" if "path" in source.Config.model_fields else ""
        what = (source.__doc__ or "").splitlines()[0].removesuffix(".").replace("``", "`")
        assert f"\n| `data={name}{path}` | {what} |\n" in README
    assert README.count("\n| `data=") == len(SOURCES)
