"""Training code as other people write it, in short: what `docs/guides/clients.md` makes sharpness-aware.

Each text is a program in the form of the original. All but `IMAGENET` leave what they trained in `result`,
and their losses call `traced()`, by which traces are counted.
"""

NNX_MNIST = """
class CNN(nnx.Module):
    def __init__(self, *, rngs):
        self.conv = nnx.Conv(1, 4, kernel_size=(3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(rate=0.25)
        self.linear = nnx.Linear(36, 3, rngs=rngs)

    def __call__(self, x, rngs):
        x = nnx.relu(self.dropout(self.norm(self.conv(x)), rngs=rngs))
        return self.linear(nnx.avg_pool(x, (2, 2), (2, 2)).reshape(x.shape[0], -1))


model = CNN(rngs=nnx.Rngs(0))
optimizer = nnx.Optimizer(model, optax.adamw(learning_rate, momentum), wrt=nnx.Param)
metrics = nnx.MultiMetric(accuracy=nnx.metrics.Accuracy(), loss=nnx.metrics.Average("loss"))


def loss_fn(model, rngs, batch):
    traced()
    logits = model(batch["image"], rngs)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits=logits, labels=batch["label"]).mean()
    return loss, logits


@nnx.jit
def train_step(model, optimizer, metrics, rngs, batch):
    grad_fn = nnx.value_and_grad(loss_fn, has_aux=True)
    (loss, logits), grads = grad_fn(model, rngs, batch)
    metrics.update(loss=loss, logits=logits, labels=batch["label"])
    optimizer.update(model, grads)


model.train()
rngs = nnx.Rngs(1)
for batch in batches:
    train_step(model, optimizer, metrics, rngs, batch)
result = nnx.state((model, rngs), nnx.Not(nnx.RngKey)), metrics.compute()
"""

GEMMA = """
class TrainState(train_state.TrainState):
    graphdef: nnx.GraphDef


def train_step(state, inputs, targets):
    def loss_fn(params):
        traced()
        module = nnx.merge(state.graphdef, params)
        logits = module(inputs)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()
        return loss, logits

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, _), grads = grad_fn(state.params)
    return state.apply_gradients(grads=grads), {"loss": loss}


tx = optax.adamw(learning_rate, b1=0.9, b2=0.98, weight_decay=0.1)
graphdef, params = nnx.split(nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
state = TrainState.create(apply_fn=graphdef.apply, params=params, tx=tx, graphdef=graphdef)
jit_train_step = jax.jit(train_step, donate_argnums=0)
for batch in batches:
    state, metrics = jit_train_step(state, batch["x"], batch["label"])
result = state.params, metrics
"""

LINEN_BATCH_NORM = """
class Network(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x)))
        return nn.Dense(3)(nn.Dropout(0.3, deterministic=not train)(x))


class TrainState(train_state.TrainState):
    batch_stats: Any


@jax.jit
def train_step(state, batch, dropout_key):
    def loss_fn(params):
        traced()
        logits, updates = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            batch["x"], train=True, rngs={"dropout": dropout_key}, mutable=["batch_stats"],
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits=logits, labels=batch["label"]).mean()
        return loss, (logits, updates)

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, (logits, updates)), grads = grad_fn(state.params)
    state = state.apply_gradients(grads=grads)
    state = state.replace(batch_stats=updates["batch_stats"])
    return state, loss


network = Network()
variables = network.init(jax.random.key(0), batches[0]["x"], train=False)
tx = optax.sgd(learning_rate, momentum, nesterov=True)
state = TrainState.create(
    apply_fn=network.apply, params=variables["params"], batch_stats=variables["batch_stats"], tx=tx
)
for i, batch in enumerate(batches):
    state, loss = train_step(state, batch, jax.random.key(i))
result = state.params, state.batch_stats, loss
"""

NANODO = """
class TrainState(NamedTuple):
    params: Any
    opt_state: Any


def loss_fn(params, in_BxL):
    traced()
    hidden = jnp.tanh(in_BxL @ params["in"])
    loss = jnp.mean((hidden @ params["out"] - in_BxL) ** 2)
    return loss, {"norm": jnp.sqrt(jnp.mean(hidden**2))}


@functools.partial(jax.jit, donate_argnames=("state",))
def train_step(state, in_BxL):
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, aux), grads = grad_fn(state.params, in_BxL)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    return TrainState(optax.apply_updates(state.params, updates), opt_state), loss, aux


mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
by_first_axis = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
keys = jax.random.split(jax.random.key(0))
params = {"in": jax.random.normal(keys[0], (8, 16)), "out": jax.random.normal(keys[1], (16, 8))}
params = jax.device_put(params, by_first_axis)
optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(learning_rate))
state = TrainState(params, optimizer.init(params))
for i in range(3):
    in_BxL = jax.device_put(jax.random.normal(jax.random.key(i), (16, 8)), by_first_axis)
    state, loss, aux = train_step(state, in_BxL)
assert state.params["in"].sharding.is_equivalent_to(by_first_axis, 2)
result = state.params, loss, aux
"""

HAIKU = """
def forward(x, is_training):
    x = hk.BatchNorm(True, True, 0.9)(jnp.tanh(hk.Linear(4)(x)), is_training)
    return hk.Linear(3)(hk.dropout(hk.next_rng_key(), 0.3, x))


network = hk.transform_with_state(forward)
opt = optax.adam(learning_rate)


def loss_fn(params, state, rng, batch):
    traced()
    logits, state = network.apply(params, state, rng, batch["x"], True)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean(), state


@jax.jit
def train_step(params, state, opt_state, rng, batch):
    (loss, state), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, state, rng, batch)
    updates, opt_state = opt.update(grads, opt_state)
    return optax.apply_updates(params, updates), state, opt_state, loss


params, state = network.init(jax.random.key(0), batches[0]["x"], True)
opt_state = opt.init(params)
for i, batch in enumerate(batches):
    params, state, opt_state, loss = train_step(params, state, opt_state, jax.random.key(i), batch)
result = params, state, loss
"""

PPO = """
def make_train(config, rho):
    def train(rng):
        network = ActorCritic()
        rng, key = jax.random.split(rng)
        params = network.init(key, jnp.zeros(4))
        tx = optax.chain(optax.clip_by_global_norm(config["CLIP_NORM"]), optax.adam(config["LR"], eps=1e-5))
        train_state = TrainState.create(apply_fn=network.apply, params=params, tx=tx)

        def _update_minibatch(train_state, batch_info):
            def _loss_fn(params, obs, action, old_log_prob, advantage, target):
                traced()
                logits, value = network.apply(params, obs)
                log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), action[:, None], 1)[:, 0]
                ratio = jnp.exp(log_prob - old_log_prob)
                clipped = jnp.clip(ratio, 1.0 - config["CLIP_EPS"], 1.0 + config["CLIP_EPS"])
                loss_actor = -jnp.minimum(ratio * advantage, clipped * advantage).mean()
                value_loss = 0.5 * jnp.square(value - target).mean()
                entropy = -jnp.sum(jax.nn.softmax(logits) * jax.nn.log_softmax(logits), -1).mean()
                return loss_actor + 0.5 * value_loss - 0.01 * entropy, (value_loss, loss_actor, entropy)

            grad_fn = jax.value_and_grad(_loss_fn, has_aux=True)
            total_loss, grads = grad_fn(train_state.params, *batch_info)
            train_state = train_state.apply_gradients(grads=grads)
            return train_state, total_loss

        def _update_step(runner_state, _):
            train_state, rng = runner_state
            rng, *keys = jax.random.split(rng, 5)
            obs, action = jax.random.normal(keys[0], (16, 4)), jax.random.randint(keys[1], (16,), 0, 3)
            logits, value = network.apply(train_state.params, obs)
            log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), action[:, None], 1)[:, 0]
            advantage, target = jax.random.normal(keys[2], (16,)), value + jax.random.normal(keys[3], (16,))
            minibatches = jax.tree.map(
                lambda x: x.reshape(2, 8, *x.shape[1:]), (obs, action, log_prob, advantage, target)
            )
            train_state, loss = jax.lax.scan(_update_minibatch, train_state, minibatches)
            return (train_state, rng), loss

        (train_state, _), metrics = jax.lax.scan(_update_step, (train_state, rng), None, 2)
        return train_state.params, metrics

    return train


config = {"LR": 1e-2, "CLIP_NORM": 0.5, "CLIP_EPS": 0.2}
rngs = jax.random.split(jax.random.key(0), 2)
result = jax.jit(jax.vmap(lambda rho: jax.vmap(make_train(config, rho))(rngs)))(radii)
"""

SVI_PROGRAM = """
def model(x, y):
    traced()
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    numpyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


guide = AutoNormal(model)
optimizer = optax.adam(learning_rate)
svi = SVI(model, guide, optimizer, loss=Trace_ELBO())
x = jnp.concatenate([batch["x"] for batch in batches])
svi_result = svi.run(jax.random.key(1), 3, x, x @ jnp.array([1.0, -2.0, 0.5]), progress_bar=False)
result = svi_result.params, svi_result.losses
"""

EQUINOX_MNIST = """
class CNN(eqx.Module):
    layers: list

    def __init__(self, key):
        key1, key2 = jax.random.split(key)
        self.layers = [
            eqx.nn.Conv2d(1, 3, kernel_size=4, key=key1), eqx.nn.MaxPool2d(kernel_size=2), jax.nn.relu,
            jnp.ravel, eqx.nn.Linear(12, 3, key=key2), jax.nn.log_softmax,
        ]

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def loss(model, x, y):
    traced()
    pred_y = jax.vmap(model)(x)
    return -jnp.mean(jnp.take_along_axis(pred_y, jnp.expand_dims(y, 1), axis=1))


def train(model, batches, optim):
    opt_state = optim.init(eqx.filter(model, eqx.is_array))

    @eqx.filter_jit
    def make_step(model, opt_state, x, y):
        loss_value, grads = eqx.filter_value_and_grad(loss)(model, x, y)
        updates, opt_state = optim.update(grads, opt_state, eqx.filter(model, eqx.is_array))
        model = eqx.apply_updates(model, updates)
        return model, opt_state, loss_value

    for batch in batches:
        x, y = jnp.moveaxis(batch["image"], -1, 1), batch["label"]
        model, opt_state, train_loss = make_step(model, opt_state, x, y)
    return model, train_loss


optim = optax.adamw(learning_rate)
model, loss_value = train(CNN(jax.random.key(0)), batches, optim)
result = eqx.filter(model, eqx.is_array), loss_value
"""

EQUINOX_RNN = """
class RNN(eqx.Module):
    hidden_size: int
    cell: eqx.Module
    linear: eqx.nn.Linear
    bias: jax.Array

    def __init__(self, in_size, out_size, hidden_size, *, key):
        ckey, lkey = jax.random.split(key)
        self.hidden_size = hidden_size
        self.cell = eqx.nn.GRUCell(in_size, hidden_size, key=ckey)
        self.linear = eqx.nn.Linear(hidden_size, out_size, use_bias=False, key=lkey)
        self.bias = jnp.zeros(out_size)

    def __call__(self, input):
        def f(carry, inp):
            return self.cell(inp, carry), None

        out, _ = jax.lax.scan(f, jnp.zeros((self.hidden_size,)), input)
        return jax.nn.sigmoid(self.linear(out) + self.bias)


@eqx.filter_value_and_grad
def compute_loss(model, x, y):
    traced()
    pred_y = jax.vmap(model)(x)
    return -jnp.mean(y * jnp.log(pred_y) + (1 - y) * jnp.log(1 - pred_y))


@eqx.filter_jit
def make_step(model, x, y, opt_state):
    loss, grads = compute_loss(model, x, y)
    updates, opt_state = optim.update(grads, opt_state)
    model = eqx.apply_updates(model, updates)
    return loss, model, opt_state


model = RNN(in_size=1, out_size=1, hidden_size=3, key=jax.random.key(0))
optim = optax.adam(learning_rate)
opt_state = optim.init(eqx.filter(model, eqx.is_inexact_array))
for batch in batches:
    loss, model, opt_state = make_step(model, batch["x"][..., None], batch["label"][:, None] % 2, opt_state)
result = eqx.filter(model, eqx.is_inexact_array), loss
"""

EQUINOX_BATCH_NORM = """
class Model(eqx.Module):
    norm1: eqx.nn.BatchNorm
    spectral_linear: eqx.nn.SpectralNorm
    linear1: eqx.nn.Linear

    def __init__(self, key):
        key1, key2, key3 = jax.random.split(key, 3)
        self.norm1 = eqx.nn.BatchNorm(input_size=3, axis_name="batch", mode="batch")
        self.spectral_linear = eqx.nn.SpectralNorm(
            layer=eqx.nn.Linear(3, 4, key=key1), weight_name="weight", key=key2
        )
        self.linear1 = eqx.nn.Linear(4, 3, key=key3)

    def __call__(self, x, state):
        x, state = self.norm1(x, state)
        x, state = self.spectral_linear(x, state)
        return self.linear1(jax.nn.relu(x)), state


def compute_loss(model, state, xs, ys):
    traced()
    batch_model = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    pred_ys, state = batch_model(xs, state)
    loss = optax.softmax_cross_entropy_with_integer_labels(pred_ys, ys).mean()
    return loss, state


@eqx.filter_jit
def make_step(model, state, opt_state, xs, ys):
    grads, state = eqx.filter_grad(compute_loss, has_aux=True)(model, state, xs, ys)
    updates, opt_state = optim.update(grads, opt_state)
    model = eqx.apply_updates(model, updates)
    return model, state, opt_state


model, state = eqx.nn.make_with_state(Model)(jax.random.key(0))
optim = optax.adam(learning_rate)
opt_state = optim.init(eqx.filter(model, eqx.is_inexact_array))
for batch in batches:
    model, state, opt_state = make_step(model, state, opt_state, batch["x"], batch["label"])
result = eqx.filter(model, eqx.is_inexact_array), jax.tree.leaves(state)
"""

EQUINOX_FROZEN = """
@eqx.filter_jit
def make_step(model, x, y, opt_state):
    @eqx.filter_value_and_grad
    def loss(diff_model, static_model, x, y):
        traced()
        model = eqx.combine(diff_model, static_model)
        pred_y = jax.vmap(model)(x)
        return jnp.mean((y - pred_y) ** 2)

    diff_model, static_model = eqx.partition(model, filter_spec)
    value, grads = loss(diff_model, static_model, x, y)
    updates, opt_state = optim.update(grads, opt_state)
    model = eqx.apply_updates(model, updates)
    return value, model, opt_state


original_model = eqx.nn.MLP(in_size=3, out_size=1, width_size=4, depth=2, key=jax.random.key(0))
filter_spec = jax.tree.map(lambda _: False, original_model)
filter_spec = eqx.tree_at(
    lambda tree: (tree.layers[-1].weight, tree.layers[-1].bias), filter_spec, replace=(True, True)
)
model = original_model
optim = optax.sgd(learning_rate)
opt_state = optim.init(model)
for batch in batches:
    value, model, opt_state = make_step(model, batch["x"], batch["label"][:, None], opt_state)
assert eqx.tree_equal(model.layers[0], original_model.layers[0])
result = eqx.filter(model, filter_spec), value
"""

EQUINOX_PARALLEL = """
def compute_loss(model, x, y):
    traced()
    pred_y = jax.vmap(model)(x)
    return jnp.mean((y - pred_y) ** 2)


optim = optax.adam(learning_rate)
model = eqx.nn.MLP(in_size=3, out_size=1, width_size=4, depth=2, key=jax.random.key(0))
opt_state = optim.init(eqx.filter(model, eqx.is_inexact_array))

mesh = jax.make_mesh((4,), ("batch",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
data_sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
model_sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
model, opt_state = eqx.filter_shard((model, opt_state), model_sharding)


@eqx.filter_jit(donate="all")
def train_step(model, opt_state, x, y):
    model, opt_state = eqx.filter_shard((model, opt_state), model_sharding)
    x, y = eqx.filter_shard((x, y), data_sharding)
    loss, grads = eqx.filter_value_and_grad(compute_loss)(model, x, y)
    updates, opt_state = optim.update(grads, opt_state, eqx.filter(model, eqx.is_inexact_array))
    model = eqx.apply_updates(model, updates)
    return *eqx.filter_shard((model, opt_state), model_sharding), loss


for batch in batches:
    x, y = eqx.filter_shard((batch["x"] + 0.0, batch["label"][:, None] + 0.0), data_sharding)
    model, opt_state, loss = train_step(model, opt_state, x, y)
result = eqx.filter(model, eqx.is_inexact_array), loss
"""

EQUINOX_BERT = """
class Classifier(eqx.Module):
    embedding: eqx.nn.Embedding
    attention: eqx.nn.MultiheadAttention
    norm: eqx.nn.LayerNorm
    dropout: eqx.nn.Dropout
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.embedding = eqx.nn.Embedding(7, 4, key=keys[0])
        self.attention = eqx.nn.MultiheadAttention(2, 4, dropout_p=0.1, key=keys[1])
        self.norm = eqx.nn.LayerNorm(4)
        self.dropout = eqx.nn.Dropout(0.1)
        self.head = eqx.nn.Linear(4, 2, key=keys[2])

    def __call__(self, inputs, enable_dropout, key):
        a_key, d_key = jax.random.split(key)
        x = jax.vmap(self.embedding)(inputs["token_ids"])
        x = jax.vmap(self.norm)(x + self.attention(x, x, x, inference=not enable_dropout, key=a_key))
        return self.head(self.dropout(x[0], inference=not enable_dropout, key=d_key))


@eqx.filter_value_and_grad
def compute_loss(classifier, inputs, key):
    traced()
    batch_size = inputs["token_ids"].shape[0]
    batched_keys = jax.random.split(key, num=batch_size)
    logits = jax.vmap(classifier, in_axes=(0, None, 0))(inputs, True, batched_keys)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits=logits, labels=inputs["label"]))


def make_step(classifier, inputs, opt_state, key, tx):
    key, new_key = jax.random.split(key)
    loss, grads = compute_loss(classifier, inputs, key)
    updates, opt_state = tx.update(grads, opt_state, eqx.filter(classifier, eqx.is_inexact_array))
    classifier = eqx.apply_updates(classifier, updates)
    return loss, classifier, opt_state, new_key


p_make_step = eqx.filter_jit(make_step)
classifier, train_key = Classifier(jax.random.key(0)), jax.random.key(1)
tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(learning_rate=learning_rate))
opt_state = tx.init(eqx.filter(classifier, eqx.is_inexact_array))
for batch in batches:
    inputs = {"token_ids": jnp.abs(batch["x"] * 3).astype(jnp.int32) % 7, "label": batch["label"] % 2}
    loss, classifier, opt_state, train_key = p_make_step(classifier, inputs, opt_state, train_key, tx)
result = eqx.filter(classifier, eqx.is_inexact_array), loss
"""

IMAGENET = """
class TrainState(train_state.TrainState):
    batch_stats: Any
    dynamic_scale: DynamicScale


def train_step(state, batch):
    def loss_fn(params):
        logits, new_model_state = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats}, batch["image"], mutable=["batch_stats"]
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
        weight_l2 = sum(jnp.sum(x**2) for x in jax.tree_util.tree_leaves(params) if x.ndim > 1)
        return loss + 0.0001 * 0.5 * weight_l2, (new_model_state, logits)

    dynamic_scale = state.dynamic_scale
    if dynamic_scale:
        grad_fn = dynamic_scale.value_and_grad(loss_fn, has_aux=True, axis_name="batch")
        dynamic_scale, is_fin, aux, grads = grad_fn(state.params)
    else:
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        aux, grads = grad_fn(state.params)
        grads = lax.pmean(grads, axis_name="batch")
    new_model_state, logits = aux[1]
    new_state = state.apply_gradients(grads=grads, batch_stats=new_model_state["batch_stats"])
    if dynamic_scale:
        select = functools.partial(jnp.where, is_fin)
        new_state = new_state.replace(
            opt_state=jax.tree_util.tree_map(select, new_state.opt_state, state.opt_state),
            params=jax.tree_util.tree_map(select, new_state.params, state.params),
            dynamic_scale=dynamic_scale,
        )
    return new_state, aux[0]


tx = optax.sgd(0.1, momentum=0.9, nesterov=True)
variables = network.init(jax.random.key(0), images[0])
state = TrainState.create(
    apply_fn=network.apply, tx=tx, params=variables["params"], batch_stats=variables["batch_stats"],
    dynamic_scale=dynamic_scale,
)
state = jax.tree.map(lambda x: jnp.broadcast_to(x, (8, *jnp.shape(x))), state)
p_train_step = jax.pmap(train_step, axis_name="batch")
for i in range(3):
    state, loss = p_train_step(state, {"image": images, "label": labels})
"""
