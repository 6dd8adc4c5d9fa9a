"""What several files share because it takes seconds to make."""

import pytest


@pytest.fixture(scope="session")
def promoter_home(tmp_path_factory):
    """A `Home`; each test begins again."""
    from tests.promoter_lab import Home

    return Home(tmp_path_factory.mktemp("promoter"))
