"""A server that answers for many adapters over one base, by the protocol of OpenAI.

    HTTP    app  complete  answers  texts  protocol  guard  metrics
    store   names -> versions of adapters: disk -> host memory -> slots of the engine
    driver  the thread that owns the engine; `turns` chooses which job is next

The name of an adapter is the name of a model. A request leases the versions that it asks for, and
keeps them until it ends.
"""
