"""The mask bank: packed masks of many domains over one backbone, in memory and in files."""

from dwm_fast.bank.adapter import MaskAdapter
from dwm_fast.bank.bank import MaskBank
from dwm_fast.bank.encode import CODINGS, encode_domain, write_mask_file
from dwm_fast.bank.file import MaskFile
from dwm_fast.bank.fingerprint import fingerprint
from dwm_fast.bank.folder import open_domain, read_rows
from dwm_fast.bank.foreign import (
    as_masks,
    as_ternary,
    from_packbits,
    from_pruned,
    read_foreign,
    read_ternary,
    to_packbits,
    to_pruned,
    write_foreign,
)
from dwm_fast.bank.holdings import Holding, Holdings
from dwm_fast.bank.ownership import Ownership, read_ownership, write_ownership
from dwm_fast.bank.record import FORMS, DomainMasks, Layout, MaskInfo, make_domain, pack_signs
from dwm_fast.bank.serve import Served

__all__ = [
    "CODINGS",
    "FORMS",
    "DomainMasks",
    "Holding",
    "Holdings",
    "Layout",
    "MaskAdapter",
    "MaskBank",
    "MaskFile",
    "MaskInfo",
    "Ownership",
    "Served",
    "as_masks",
    "as_ternary",
    "encode_domain",
    "fingerprint",
    "from_packbits",
    "from_pruned",
    "make_domain",
    "open_domain",
    "pack_signs",
    "read_foreign",
    "read_ownership",
    "read_rows",
    "read_ternary",
    "to_packbits",
    "to_pruned",
    "write_foreign",
    "write_mask_file",
    "write_ownership",
]
