"""Pages that the site takes from elsewhere in the repository: README.md as its home, and the benchmarks' pictures."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
HOME = "index.md"


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add README.md as the home page, and the pictures of benchmarks/results/."""
    files.append(File.generated(config, HOME, content=(ROOT / "README.md").read_text()))
    for picture in sorted((ROOT / "benchmarks/results").glob("*.png")):
        files.append(File.generated(config, f"results/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links, which are the repository's, to the same places of the site."""
    del config, files
    if page.file.src_uri == HOME:
        page.meta["hide"] = ["navigation"]  # of one entry
        markdown = markdown.replace("](docs/", "](").replace("](benchmarks/results/", "](results/")
    return markdown.replace("](../benchmarks/results/", "](results/")
