"""All metadata is in pyproject.toml; this file is where the C++ extension is declared."""

from setuptools import setup

setup()
