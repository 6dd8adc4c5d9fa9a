"""The one error type that a person sees: what is wrong, and what to do about it."""


class EvergreenError(Exception):
    """A foreseen failure, told in one line.

    Args:
        problem: What is wrong, as a sentence without a full stop.
        remedy: What to do about it, as an imperative sentence.
    """

    def __init__(self, problem: str, remedy: str = "") -> None:
        self.problem = problem
        self.remedy = remedy
        super().__init__(f"{problem}. {remedy}".rstrip(". ") + "." if remedy else problem)
