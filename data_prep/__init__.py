"""Raw web pages in, clean documents, a tokenizer and token shards out: `trivium data`."""
