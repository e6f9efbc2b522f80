"""The images of a study: PACS from disk in any of its layouts, or the built-in procedural stand-in."""

from dwm_fast.pacs.data.layouts import CLASSES, DOMAINS, canonical_domain
from dwm_fast.pacs.data.load import DomainSet, PacsData, download_pacs, fingerprint, load_pacs, validation_part

__all__ = [
    "CLASSES",
    "DOMAINS",
    "DomainSet",
    "PacsData",
    "canonical_domain",
    "download_pacs",
    "fingerprint",
    "load_pacs",
    "validation_part",
]
