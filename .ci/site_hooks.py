"""What `mkdocs.yml` needs beyond its plug-ins: hooks of MkDocs, and an extension of Griffe."""

import ast
import contextlib
import html
import re
import zlib
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

log = get_plugin_logger("site_hooks")
ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = re.compile(r"\]\(\.\./((?:benchmarks|ppl_vae|tests)/[^)#]+)\)")
MATH = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
PAGE = re.compile(r'href="((?:\.\./)?)(?:docs/)?([\w/]+)\.(?:md|ipynb)\b')  # as notebooks link
REST = r"(?:(?!</script>).)*"
FETCHES = re.compile(rf"<script\b[^>]*>{REST}(?:mermaid|MathJax){REST}</script>", re.DOTALL)
TABLE = re.compile(r"^( *)(==+)( +)==+\n(.*?)^ *==+ +==+$", re.MULTILINE | re.DOTALL)


def public_names() -> list[str]:
    """Return the paths of all names in an `__all__` of the library, read from its sources."""
    paths = []
    for source in sorted([*ROOT.glob("ppl_vae/*.py"), *ROOT.glob("ppl_vae/*/__init__.py")]):
        module = ".".join(source.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.parse(source.read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                paths += [f"{module}.{name}" for name in ast.literal_eval(node.value)]
    return paths


PATHS = {path.rpartition(".")[2]: path for path in public_names()}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Copy into the site what pages link to outside of docs: records of benchmarks, sources."""
    for page in files.documentation_pages():
        if page.src_uri.endswith(".md"):
            for target in OUTSIDE.findall(page.content_string):
                if (ROOT / target).is_file() and files.get_file_from_path(target) is None:
                    files.append(File.generated(config, target, abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Link to those copies; a link to what is no file stays as it is, and fails the build."""
    return OUTSIDE.sub(lambda m: f"]({m[1]})" if (ROOT / m[1]).is_file() else m[0], markdown)


def on_page_content(content: str, page: Page, **_: Any) -> str:
    """Turn TeX into MathML, which browsers draw by themselves; mend notebooks' links, drop their scripts."""

    def mathml(match: re.Match[str]) -> str:
        tex = re.sub(r"\\(log|exp|tanh|sin|cos)\s+(?![({\s])", r"\\\1\\, ", html.unescape(match[3]))
        return convert(tex, display="inline" if match[2] == "(" else "block")

    if page.file.src_uri.endswith(".ipynb"):
        content = PAGE.sub(r'href="\1\2.html', FETCHES.sub("", content))
    return MATH.sub(mathml, content)


def on_post_build(config: MkDocsConfig) -> None:
    """Warn, which fails a strict build, of public names that are not on the site."""
    inventory = (Path(config.site_dir) / "objects.inv").read_bytes().split(b"\n", 4)[4]
    found = {line.split(" ")[0] for line in zlib.decompress(inventory).decode().splitlines()}
    for path in public_names():
        if path not in found and path != "ppl_vae.__version__":
            log.warning("%s: a public name that the reference does not show", path)


class Docstrings(griffe.Extension):
    """Markdown of what docstrings hold of reStructuredText, and sections under names that Griffe knows."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring, if there is one."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Give `training.fit` and others that are named as their module to the function, as Python does."""
        _resolve(pkg)


def _resolve(package: griffe.Module) -> None:
    for module in package.modules.values():
        if not module.is_alias:
            _resolve(module)
    for name, member in list(package.members.items()):
        if member.is_alias:
            with contextlib.suppress(griffe.AliasResolutionError, griffe.CyclicAliasError):
                member.resolve_target()
        elif member.is_module and package.exports and name in package.exports and name in member.members:
            package.members[name] = griffe.Alias(name, member.members[name], parent=package)


def as_markdown(text: str) -> str:
    """Return a docstring of the library as the site takes it."""
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    text = re.sub(r"^( *)\.\. math::\s+(.+)$", r"\1\\[\2\\]", text, flags=re.MULTILINE)
    text = re.sub(r":math:`([^`]+)`", r"\\(\1\\)", text)
    text = re.sub(r":sup:`([^`]+)`", r"<sup>\1</sup>", text)
    text = TABLE.sub(_table, text)

    def link(match: re.Match[str]) -> str:
        return f"[`{match[1]}`][{PATHS.get(match[1], match[1])}]"

    return re.sub(r":(?:class|func|mod|meth):`([\w.]+)`", link, text)


def _table(match: re.Match[str]) -> str:
    """Return a table of two columns, whose first is empty where the row above goes on."""
    start, rows = len(match[1]), list[list[str]]()
    end = start + len(match[2])
    for line in match[4].splitlines():
        if line[start:end].strip():
            rows.append([line[start:end].strip(), line[end:].strip()])
        else:
            rows[-1][1] += f" {line.strip()}"
    cells = [(name, re.sub(r"(?<!\\)[|]", r"\|", text)) for name, text in rows]
    lines = ["| | |", "|---|---|", *(f"| `{name}` | {text} |" for name, text in cells)]
    return "\n".join(match[1] + line for line in lines)
