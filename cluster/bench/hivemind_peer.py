"""Times hivemind's expert server and the same block in one process. Run by an interpreter that has hivemind.

Arguments: hidden size, tokens a batch, rounds. Prints {"hivemind": tokens/s, "raw": tokens/s}.
"""

import json
import statistics
import sys
import time


def main() -> None:
    import hivemind
    import torch
    from hivemind.moe.client.expert import create_remote_experts
    from hivemind.moe.expert_uid import ExpertInfo
    from hivemind.moe.server import ModuleBackend, Server, layers
    from hivemind.p2p import PeerInfo
    from hivemind.utils import BatchTensorDescriptor, get_dht_time

    hidden, tokens, rounds = (int(a) for a in sys.argv[1:4])

    def block() -> torch.nn.Module:
        return layers.name_to_block["ffn"](hidden)

    def adam(module: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(module.parameters(), lr=1e-4)

    module = block()
    backend = ModuleBackend(
        name="expert.0",
        module=module,
        optimizer=adam(module),
        args_schema=(BatchTensorDescriptor(hidden),),
        outputs_schema=BatchTensorDescriptor(hidden),
        min_batch_size=1,
        max_batch_size=4 * tokens,
    )
    dht = hivemind.DHT(start=True)
    server = Server(dht, {"expert.0": backend}, num_connection_handlers=1, device="cpu")
    server.start()
    server.ready.wait(60)
    client_dht = hivemind.DHT(initial_peers=dht.get_visible_maddrs(), start=True)
    info = ExpertInfo(
        "expert.0", PeerInfo(dht.peer_id, [a.decapsulate("/p2p") for a in dht.get_visible_maddrs()]).peer_id
    )
    (remote,) = create_remote_experts([info], dht=client_dht)
    x, grad = torch.randn(2, tokens, hidden)
    local = block()
    optimizer = adam(local)

    def served() -> None:
        remote(x.detach().requires_grad_()).backward(grad)

    def raw() -> None:
        local(x.detach().requires_grad_()).backward(grad)
        optimizer.step()
        optimizer.zero_grad()

    seconds = {"hivemind": [], "raw": []}
    for number in range(rounds + 1):
        for name, run in (("hivemind", served), ("raw", raw)):
            started = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - started)
    print(json.dumps({name: tokens / statistics.median(values) for name, values in seconds.items()}), flush=True)
    get_dht_time()
    server.shutdown()
    client_dht.shutdown()
    dht.shutdown()


if __name__ == "__main__":
    main()
