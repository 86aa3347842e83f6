"""The errors that mean bad input or wrong use, as opposed to a defect of ours."""


class LipflowError(Exception):
    """Bad input or wrong use: the message names what was found, what was expected and what to do.

    The command line prints it on one line and exits with code 2.
    """


class CaptureError(LipflowError):
    """A capture that is none, or one with a file that cannot be used."""


class ShardSetError(LipflowError):
    """A shard set without a manifest, or one whose shards do not match it."""


class StorageError(LipflowError):
    """Storage that cannot be reached, read or written."""


class ConfigError(LipflowError):
    """A recipe that is not valid."""
