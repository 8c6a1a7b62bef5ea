"""Image files to verified patches, and patches to batches whose order depends on (seed, step) alone.

`pipeline.data.ingest.ray_ingest` and `pipeline.data.feed.ray_feed`, which need Ray, are imported explicitly.
"""

from pipeline.data.format.held_out import HeldOutPhoto, read_held_out
from pipeline.data.format.manifest import Manifest, has_manifest, load_manifest
from pipeline.data.ingest.plan import plans_held_out
from pipeline.data.ingest.prepare import check_source, prepare
