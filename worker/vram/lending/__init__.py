"""What the broker keeps and how it serves, one noun a module: who holds, who waits, who was asked.

All of it belongs to the broker (worker/vram/broker.py) and to its thread. `Books` has the state,
`Choices` puts it before the policy and changes nothing, `Service` carries out what that says.
"""
