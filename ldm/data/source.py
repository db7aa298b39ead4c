"""Captioned pictures are opened in the way that the config states."""

from ldm.data.indexed import IndexedShards
from ldm.data.settings import PicturesConfig
from ldm.data.streaming import StreamedShards


def open_pictures(config: PicturesConfig) -> IndexedShards | StreamedShards:
    """A source whose `batches(start, rank, world_size, workers)` gives a process's part of every global batch.

    Raises DataError and SettingError for what is wrong with the shards, before a batch is asked for.
    """
    return StreamedShards(config) if config.mode == "streaming" else IndexedShards(config)
