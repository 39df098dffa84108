"""blocks -> lanes -> packing -> masking -> loader: from shards to one item per optimizer step."""
