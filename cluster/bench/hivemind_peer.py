"""Times hivemind's expert server and the same block in one process. Run by an interpreter that has hivemind.

Arguments: hidden size, tokens a batch, rounds. Prints {"hivemind": tokens/s, "raw": tokens/s}.
"""

import json
import statistics
import sys
import time


def main() -> None:
    import torch
    from hivemind import DHT
    from hivemind.moe.client.expert import create_remote_experts
    from hivemind.moe.expert_uid import ExpertInfo
    from hivemind.moe.server import background_server
    from hivemind.moe.server.layers import name_to_block

    hidden, tokens, rounds = (int(a) for a in sys.argv[1:4])
    x, grad = torch.randn(2, tokens, hidden)
    local = name_to_block["ffn"](hidden)
    optimizer = torch.optim.Adam(local.parameters(), lr=1e-4)

    def raw() -> None:
        local(x.detach().requires_grad_()).backward(grad)
        optimizer.step()
        optimizer.zero_grad()

    settings = {"num_handlers": 1, "min_batch_size": 1, "max_batch_size": 4 * tokens, "device": "cpu"}
    uid = "expert.0"
    with background_server(expert_uids=[uid], expert_cls="ffn", hidden_dim=hidden, **settings) as server:
        dht = DHT(initial_peers=server.addrs, start=True)
        (remote,) = create_remote_experts([ExpertInfo(uid, server.peer_id)], dht=dht)

        def served() -> None:
            remote(x.detach().requires_grad_()).backward(grad)

        seconds = {"hivemind": [], "raw": []}
        for number in range(rounds + 1):
            for name, run in (("hivemind", served), ("raw", raw)):
                started = time.perf_counter()
                run()
                if number:
                    seconds[name].append(time.perf_counter() - started)
        print(json.dumps({name: tokens / statistics.median(v) for name, v in seconds.items()}), flush=True)
        dht.shutdown()


if __name__ == "__main__":
    main()
