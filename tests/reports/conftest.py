from tests.training.conftest import small as small
