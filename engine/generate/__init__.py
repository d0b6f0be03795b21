"""Using a trained model: sampling with a key-value cache, and evaluation, under any tensor × pipeline layout."""
