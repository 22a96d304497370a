"""Prints, as pip constraints, the oldest version of everything that pyproject.toml declares."""

import pathlib
import re
import tomllib

project = tomllib.loads(pathlib.Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
groups = [project["dependencies"], *project["optional-dependencies"].values()]
for requirement in sorted({requirement for group in groups for requirement in group}):
    if bounds := re.fullmatch(r"([\w-]+)>=([\d.]+).*", requirement):
        name, version = bounds.groups()
        print(f"{name}=={version}")
        if name == "jax":
            print(f"jaxlib=={version}")
