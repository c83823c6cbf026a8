"""Which channels are missed least by the layers that read them, once those are refitted?"""

from typing import ClassVar

from compress.pruning.criteria.taylor import Taylor


class Reconstruction(Taylor):
    """Taylor scores say how wide each group should be; how well its readers can be refitted says which channels go.

    Where the readers of a group cannot be refitted (grouped convolutions, very wide layers) the scores say both.

    Source: `compress.pruning.elimination`.
    """

    name: ClassVar[str] = "reconstruction"
    orders_by_refit: ClassVar[bool] = True
