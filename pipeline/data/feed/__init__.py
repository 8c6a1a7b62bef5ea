"""From a data set to training batches: order of samples, fetching, prefetching."""

from pipeline.data.feed.fetch import RawBatch
from pipeline.data.feed.thread_feed import Feed
