"""Install the top-level folders as a namespace: envs/ becomes fewstep.envs, and so on.

Everything else (name, version, dependencies, the `fewstep` command) is in pyproject.toml.
"""

from setuptools import find_packages, setup

TOP = ["common", "envs", "agents", "critics", "runs"]
SUB = find_packages(include=[pattern for top in TOP for pattern in (top, f"{top}.*")])

setup(
    packages=[f"fewstep.{name}" for name in SUB],
    package_dir={f"fewstep.{top}": top for top in TOP},
    package_data={f"fewstep.{top}": ["py.typed"] for top in TOP},
)
