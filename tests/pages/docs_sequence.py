"""The page's sequence in seconds: its few images and narrow network are a test's, its calls are the page's."""

import dwm_fast.pacs.config
from tests.pacs import sequence_for_tests, study_for_tests

study_for_tests.tiny(monkeypatch)
monkeypatch.setattr(dwm_fast.pacs.config, "builtin_defaults", lambda: sequence_for_tests.BASE)
