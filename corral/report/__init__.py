"""One run on one page: what was trained on what, whether it helped, and the proof."""
