"""From files to packed batches: file -> record -> `Sample` -> ids -> plan -> `PackedBatch`. Imports no other wing."""
