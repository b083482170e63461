"""The written page of a report, checked for what every page must be: well-formed, self-contained, small."""

from html.parser import HTMLParser

from beats_ray.data.storage import Place

MOST_BYTES = 5_000_000


def fetched_addresses(attrs: list[tuple[str, str | None]]) -> list[str]:
    """Addresses that a browser would fetch from elsewhere: not those within the page."""
    values = [str(value) for name, value in attrs if name in ("src", "href", "xlink:href", "data", "srcset", "poster")]
    return [value for value in values if not value.startswith(("data:", "#"))]


class TagChecker(HTMLParser):
    """Fails on tags that do not nest, and collects addresses that a browser would fetch."""

    VOID = {"meta", "br", "link", "img", "input", "hr", "line", "rect", "path", "polyline"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += fetched_addresses(attrs)
        if tag not in self.VOID or (
            tag in ("polyline", "rect") and not self.get_starttag_text().rstrip().endswith("/>")
        ):  # type: ignore[union-attr]
            self.open.append(tag)

    def handle_startendtag(self, _tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += fetched_addresses(attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> does not close what is open"

    def handle_data(self, data: str) -> None:
        self.text += data


def read_page(run: Place) -> tuple[str, str]:
    """The page of the run and its text. AssertionError where it is not what every page must be."""
    html = (run / "report.html").read_bytes().decode()
    checker = TagChecker()
    checker.feed(html)
    assert checker.open == [], f"never closed: {checker.open}"
    assert checker.fetched == [], "the page loads something from elsewhere"
    assert "url(" not in html
    assert "@import" not in html
    assert len(html.encode()) < MOST_BYTES
    return html, " ".join(checker.text.split())
