import re

from cotenant.contract.reasons import Reason


class TestReasons:
    """Every no is one of these, with a label for machines and a sentence for people that never changes."""

    def test_every_reason_has_a_sentence_of_its_own(self) -> None:
        assert len(Reason) == len({reason.sentence for reason in Reason})

    def test_no_sentence_holds_a_number(self) -> None:
        # one that changed with the numbers would make kube-scheduler try the pod again at once, for ever
        assert [] == [reason for reason in Reason if re.search(r"\d", reason.sentence)]

    def test_every_sentence_reads_well_in_the_middle_of_another(self) -> None:
        # kube-scheduler writes "3 <sentence>, 2 <sentence>."
        assert [] == [reason for reason in Reason if not reason.sentence[0].islower() or reason.sentence[-1] in ".!"]

    def test_every_label_is_one_word_in_camel_case(self) -> None:
        assert [] == [reason for reason in Reason if not re.fullmatch(r"[A-Z][A-Za-z]+", reason.value)]
