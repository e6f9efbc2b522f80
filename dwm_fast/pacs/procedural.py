"""The short way to `dwm_fast.pacs.data.procedural`."""

from dwm_fast.pacs.data.procedural import procedural

__all__ = ["procedural"]
