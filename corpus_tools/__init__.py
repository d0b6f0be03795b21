"""From raw text to a corpus that ranks read: cleaning, tokenizers, encoding, checks.  No rank imports it."""
