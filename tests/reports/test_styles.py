from rigl_optax.reports import styles
from rigl_optax.training import methods


def test_the_table_lists_methods_that_there_are():
    assert styles._STYLES.keys() <= methods.METHODS.keys()


def test_methods_have_different_names_and_curves_that_can_be_told_apart():
    names = [style.name for style in styles._STYLES.values()]
    assert len(set(names)) == len(names)
    own = [(s.colour, s.line) for s in styles._STYLES.values() if s.colour != styles.OTHER.colour]
    assert len(set(own)) == len(own)


def test_a_method_that_is_not_listed_keeps_its_name():
    assert styles.of("mine") == styles.Style("mine", styles.OTHER)
