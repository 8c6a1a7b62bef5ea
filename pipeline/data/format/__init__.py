"""The data set on disk: manifest, shards, row checksums, reading and verification."""
