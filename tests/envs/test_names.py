from fewstep.common.names import unknown_name


def test_a_near_miss_gets_a_suggestion_and_the_list():
    error = unknown_name("solver", "ddmi", ["heun", "ddim"])
    assert isinstance(error, ValueError)
    assert str(error) == "unknown solver 'ddmi'; did you mean 'ddim'? Known: ddim, heun."


def test_case_is_no_obstacle_to_a_suggestion():
    assert "did you mean 'SwissRoll'?" in str(unknown_name("target", "swissroll", ["SwissRoll"]))


def test_a_far_miss_gets_only_the_list():
    assert str(unknown_name("solver", 3, ["ddim"])) == "unknown solver 3. Known: ddim."
