"""What a federation is compared with: every client alone, and one pruner that sees all text. Neither is a federation.

* Standalone: every client prunes alone, and its model is its own. Uploads are kept apart, so that all models can be
  measured
  on all texts; a client that really is alone sends nothing. Source: Bai et al., "FedSpaLLM", NAACL 2025, section 4.
* Centralized: the pooled text is one participant's, with the windows that each client would have drawn. It needs one
  process that can read all texts.
"""

from fedspallm_appfl.algorithms.algorithm import Algorithm, Exchange

POOLED = "pooled"  # the id of the participant that has all the text

STANDALONE = Algorithm("standalone", [Exchange("weights")], apart=True)
CENTRALIZED = Algorithm("centralized", [Exchange("weights")], pools_text=True)
