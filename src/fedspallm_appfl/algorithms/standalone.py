"""Standalone: every client prunes alone, and its model is its own. The baseline: what a client has without a federation.

Source: Bai et al., "FedSpaLLM", NAACL 2025, section 4. Uploads are kept apart, so that all models can be measured on all
texts; a client that really is alone sends nothing.
"""

from fedspallm_appfl.algorithms.exchange import Exchange

LABEL = "standalone"
EXCHANGES = (Exchange("weights", None),)
