"""What turns token ids into token ids: one protocol (`base`), several engines. Knows no text and no conversation."""
