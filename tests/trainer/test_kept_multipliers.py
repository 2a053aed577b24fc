"""What the kernels multiply by is kept within an optimiser step's micro-batches, and let go of before the next."""

from fura_rl.adapter import multipliers


def test_the_store_is_open_in_a_step_and_cleared_after_it(train):
    seen = []

    def watch(trainer):
        compute_loss = trainer.compute_loss

        def look(*args, **kwargs):
            store = multipliers._store
            assert store is trainer._multipliers
            seen.append(len(store))
            store[len(store)] = None
            return compute_loss(*args, **kwargs)

        trainer.compute_loss = look

    def reward(completions, **kwargs):
        return [float(len(text) % 2) for text in completions]

    train(reward, prepare=watch, max_steps=2, per_device_train_batch_size=4, gradient_accumulation_steps=3)
    assert seen == [0, 1, 2] * 2
    assert multipliers._store is None
