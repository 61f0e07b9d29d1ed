from . import dann
