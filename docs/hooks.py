"""What the site does that the pages by themselves do not.

- Pages that live elsewhere in the repository join it: ELSEWHERE.
- A link to any other file of the repository becomes its name.
- The page of the architecture gets a picture of its table.
"""

import pathlib
import posixpath
import re
import textwrap

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parent.parent
ELSEWHERE = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks.md",
}
README = "index.md"  # what stands for README.md, which is the front page of the repository
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
CODE = re.compile(r"(^```.*?^```$|`[^`\n]+`)", re.DOTALL | re.MULTILINE)


def on_files(files, config):
    for source, page in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    for picture in (ROOT / "benchmarks/results").glob("*.png"):
        files.append(File.generated(config, f"results/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown, page, config, files):
    here = next((s for s, p in ELSEWHERE.items() if p == page.file.src_uri), None)
    here = here or f"docs/{page.file.src_uri}"
    pieces = CODE.split(markdown)  # code stands at odd places
    pieces[::2] = [LINK.sub(lambda link: _link(here, *link.groups()), p) for p in pieces[::2]]
    markdown = "".join(pieces)
    if page.file.src_uri == "architecture.md":
        markdown = markdown.replace("<!-- wings -->", picture(markdown) + "\n<!-- wings -->")
    return markdown


def _link(here: str, mark: str, text: str, target: str) -> str:
    """Returns a link as the site needs it, given the file in the repository that has it."""
    if re.match(r"\w+:|#", target):
        return f"{mark}[{text}]({target})"
    path, _, anchor = target.partition("#")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(here), path))
    if not (ROOT / path).exists():
        return f"{mark}[{text}]({target})"  # for the site's own check to find
    anchor = anchor and f"#{anchor}"
    if path == "README.md":
        return f"[{text}]({README})"
    if path in ELSEWHERE:
        return f"[{text}]({ELSEWHERE[path]}{anchor})"
    if path.startswith("docs/"):
        return f"{mark}[{text}]({path.removeprefix('docs/')}{anchor})"
    if mark:
        return f"![{text}](results/{posixpath.basename(path)})"
    return text if "`" in text else f"{text} (`{path}`)"


WIDTH, ROW, NAME = 760, 24, 90  # pixels; ROW is a line of file names, NAME the wing's column


def picture(markdown: str) -> str:
    """Draws the table of wings: who stands on whom, users' doors on top, C++ below."""
    table = re.search(r"<!-- wings -->\n(.*?)<!-- /wings -->", markdown, re.DOTALL)
    rows = re.findall(r"^\| `(\w+)/` \| (.*) \|$", table[1], re.MULTILINE)
    bands = [("doors", "fp8.*, linen, nnx, checkpoint, deep_gemm, tuning, python -m jax_fp8gemm")]
    bands += [(wing, files.replace("`", "")) for wing, files in reversed(rows)]
    bands += [("csrc", "handlers that XLA calls: check, find or compile the kernel, launch")]
    parts, y = [], 4
    for wing, files in bands:
        lines = textwrap.wrap(files, 88)
        height = ROW * len(lines) + 14
        parts.append(
            f'<rect x="2" y="{y}" width="{WIDTH - 4}" height="{height}" rx="6" fill="none" '
            'stroke="currentColor" stroke-opacity=".4"/>'
            f'<text x="14" y="{y + 24}" font-weight="bold">{wing}</text>'
        )
        for number, line in enumerate(lines):
            parts.append(f'<text x="{NAME + 14}" y="{y + 24 + ROW * number}">{line}</text>')
        y += height + 8
    return (
        f'<svg viewBox="0 0 {WIDTH} {y}" role="img" aria-label="each wing stands on those below" '
        'style="max-width:100%" font-size="14" font-family="sans-serif" fill="currentColor">'
        + "".join(parts)
        + "</svg>\n\nA band uses only bands below it, and files to the left in its own.\n"
    )
