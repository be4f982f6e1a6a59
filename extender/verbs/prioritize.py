"""prioritize: how good is each of these nodes for this pod."""

from cotenant.contract.request import RequestError
from extender.policies import scores
from extender.verbs.judge import Judge
from extender.verbs.wire import ExtenderArgs, HostPriority


class Prioritize:
    """Answer prioritize."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge

    def __call__(self, args: ExtenderArgs) -> list[HostPriority]:
        """Score each node 0..10 by the GPUs that the pod would get there; 0 for all where the pod is not ours."""
        names = args.candidates.names
        try:
            request = self._judge.request(args.pod)
        except RequestError:
            request = None  # filter has said so to the user
        if request is None:
            return [HostPriority(Host=name, Score=0) for name in names]
        given = scores(self._judge.weigh(request, args.candidates).costs)
        return [HostPriority(Host=name, Score=score) for name, score in zip(names, given, strict=True)]
