"""prioritize: how good is each of these nodes for this pod."""

from cotenant.contract.reasons import Reason
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
        names = args.names()
        try:
            request = self._judge.request(args.Pod)
        except RequestError:
            request = None  # filter has said so to the user
        verdicts = self._judge.judge(request, names) if request is not None else []
        costs = [None if isinstance(verdict, Reason) else verdict for verdict in verdicts] or [None] * len(names)
        return [HostPriority(Host=name, Score=score) for name, score in zip(names, scores(costs), strict=True)]
