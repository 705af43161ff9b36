"""The page of `serve --web`: what goes on at DPS and hubs, and the commands to them, in a browser on this machine.

`exchanges` remembers what was asked and answered, without secrets; `guard` lets nobody in but who has the address;
`pages` turns what is known into HTML; `actions` does what forms ask for; `site` has them on the wire.
"""
