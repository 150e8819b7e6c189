"""Training for a number of rounds, whatever they cost."""


def learn_rounds(agent, rounds, **arguments):
    """Train an agent until it has done so many rounds in all, or its own budget."""
    done = 0 if arguments.get("reset_num_timesteps", True) else agent.rounds
    if rounds <= done:
        return agent.learn(0, **arguments)
    return agent.learn(None, lambda _locals, _globals: agent.rounds < rounds, **arguments)
