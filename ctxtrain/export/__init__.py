"""Best adapters → merged model → checked zip → predictions."""
