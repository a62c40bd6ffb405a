"""The HTML file: modules joined to one script, everything inside, and no request allowed."""

import base64
import gzip
import hashlib
import json
import re
from importlib.resources import files
from typing import Any

import fastvae

MODULE = re.compile(r'^import \{[^}]*\} from "\./(\w+)\.js";\n', re.M)


def document(title: str, manifest: dict[str, Any], weights: bytes, known: list[str]) -> bytes:
    """Title, what the script is told, the engine's file, known texts -> the page.

    Args:
        title: of the page.
        manifest: JSON values.
        weights: what `fastvae.page.weights.pack` made.
        known: texts that the page compares with, or none.
    """
    script, worker, style = joined("main"), joined("worker"), _read("style.css").decode()
    # Only this very script and style run, and WebAssembly; everything else is forbidden.
    policy = (
        "default-src 'none'; "
        f"script-src 'sha256-{_digest(script)}' 'wasm-unsafe-eval'; "
        f"style-src 'sha256-{_digest(style)}'; "
        "worker-src blob:; base-uri 'none'; form-action 'none'"
    )
    parts = {
        "policy": policy,
        "version": fastvae.__version__,
        "title": _escaped(title),
        "style": style,
        "script": script,
        "worker": worker,
        "manifest": json.dumps(manifest, separators=(",", ":")).replace("<", "\\u003c"),
        "engine": _packed(_read("engine.wasm")),
        "weights": _packed(weights),
        "known": _packed(json.dumps(known).encode()) if known else "",
    }
    page = re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _read("page.html").decode())
    return page.encode()


def joined(name: str) -> str:
    """Name of a module -> its script and those that it imports, each once, as one module."""
    found: dict[str, str] = {}

    def add(name: str) -> None:
        source = _read(f"{name}.js").decode()
        for needed in MODULE.findall(source):
            if needed not in found:
                add(needed)
        body = re.sub(r"^export ", "", MODULE.sub("", source), flags=re.M)
        # Names that a module keeps to itself stay its own.
        exported = re.findall(r"^export (?:async )?(?:function|class|const) (\w+)", source, re.M)
        names = ", ".join(exported)
        head, tail = (f"const {{ {names} }} = (() => {{\n", f"return {{ {names} }};\n}})();\n")
        found[name] = head + body + tail if exported else "{\n" + body + "}\n"

    add(name)
    script = "\n".join(found.values())
    if "</script" in script or "<!--" in script:
        raise ValueError(f"{name}.js ends the script that holds it")
    return script


def _read(name: str) -> bytes:
    return (files("fastvae.page") / name).read_bytes()


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _packed(content: bytes) -> str:
    return base64.b64encode(gzip.compress(content, 9, mtime=0)).decode()


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
