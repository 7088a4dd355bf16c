"""Requests as lines of JSON, one after another, by one loaded bundle (docs/serving.md)."""

from .server import Server

__all__ = ["Server"]
